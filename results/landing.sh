# Landing on a standard model: the tables of results/landing.md, but for the rows of older commits. Days on a
# core. It skips what has a file in results/landing: delete the csv of the runs to make anew, and the json of
# piqa_*, int8, llamacpp and as_standard. These need folders in deployed/ or checkpoints: delete the csv of
# their runs, too. smollm2.sh makes the weights and texts of SmolLM2: run it first.
#
#     pip install -r requirements.txt tokenizers transformers==5.24.0 ctranslate2==4.8.5
#     pip install sentencepiece==0.2.3 xllamacpp==2026.10.11549
#     python data/python/prepare.py && OMP_NUM_THREADS=1 bash results/landing.sh scratch
#     OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 CONVERTER=some/convert_hf_to_gguf.py bash results/landing.sh tuned
#
# CONVERTER is llama.cpp's. Ours is in vendor/llama.cpp of the sources of llama-cpp-python 0.3.36:
#
#     pip download --no-deps --no-binary llama-cpp-python -d deployed llama-cpp-python==0.3.36
#     tar xzf deployed/llama_cpp_python-0.3.36.tar.gz -C deployed
set -eu
trap "exit 130" INT          # or the next run would begin
logs=results/landing
mkdir -p $logs deployed
keep() { cut -d, -f1-4,6,11 out_$1/log.csv > $logs/$1.csv; }    # step, loss, rate, norm, |a|, validation loss

run() {             # a run from scratch: its name, and flags. At its end it says the loss as the standard net
    [ ! -e $logs/$1.csv ] || return 0
    from=scratch
    [ ! -e out_$1/last.pt ] || from=resume
    python train.py config/compare.py --gelu=tanh --compile=True --log_interval=5 --out_dir=out_$1 \
        --init_from=$from "${@:2}"
    keep $1
}
fly="--scheme=midpoint_a --a=-1 --h=once"
fly1="--scheme=midpoint_a --a=-0.5 --h=once"        # 1 bit
r8="--learning_rate=8e-3 --min_lr=8e-4"
r4="--learning_rate=4e-3 --min_lr=4e-4"
r2="--learning_rate=2e-3 --min_lr=2e-4"
r16="--learning_rate=16e-3 --min_lr=16e-4"
long="--eval_interval=1172"
deep="--n_layer=24 --stored_layers=24 --max_iters=732 --eval_interval=586"

landings() {        # a name, the parts, and flags: one flight of four fifths, then each landing from there
    for part in $2; do
        [ ! -e $logs/$1_$part.csv ] || continue
        run $1_flight $long "${@:3}" --min_lr=4e-3 --max_iters=1172 --lr_decay_iters=1465
        [ -e out_$1_$part ] || cp -r out_$1_flight out_$1_$part
        run $1_$part $long "${@:3}" --lr_decay_iters=1465 --land_part=$part
    done
}

rates() {           # a name, and a rate: what seed 2 does with it
    run 12_land1_2_$1 $long $fly1 $2 --land_part=0.1 --seed=2
    run 12_land_2_$1 $long $fly $2 --land_part=0.1 --seed=2
    run 12_standard_2_${1}_0.1 $long --scheme=standard $2 --land_part=0.1 --seed=2
    run 12_symplectic_2_$1 $long --scheme=symplectic $2 --seed=2
    run 24_land1_2_$1 $deep $fly1 $2 --land_part=0.1 --seed=2
    run 24_land_2_$1 $deep $fly $2 --land_part=0.1 --seed=2
    run 24_standard_2_${1}_0.1 $deep --scheme=standard $2 --land_part=0.1 --seed=2
    run 24_symplectic_2_$1 $deep --scheme=symplectic $2 --seed=2
}

scratch() {
    for s in 2 3 4; do
        landings 12_land_$s "0.2 0.1" $fly $r8 --seed=$s
        run 12_standard_$s $long --scheme=standard $r8 --seed=$s
        run 12_standard_${s}_0.1 $long --scheme=standard $r8 --land_part=0.1 --seed=$s
        run 12_standard_${s}_0.2 $long --scheme=standard $r8 --land_part=0.2 --seed=$s
        run 12_leapfrog_${s}_half $long --scheme=leapfrog --h=0.125 $r4 --seed=$s
        run 24_land_$s $deep $fly $r8 --land_part=0.1 --seed=$s
        run 24_standard_$s $deep --scheme=standard $r8 --seed=$s
        run 24_standard_${s}_0.1 $deep --scheme=standard $r8 --land_part=0.1 --seed=$s
        run 24_leapfrog_$s $deep --scheme=leapfrog --h=0.0625 $r8 --seed=$s
        run 24_leapfrog_${s}_half $deep --scheme=leapfrog --h=0.0625 $r4 --seed=$s
        run 24_symplectic_$s $deep --scheme=symplectic $r8 --seed=$s
        run 12_land1_${s}_0.1 $long $fly1 $r8 --land_part=0.1 --seed=$s
        run 24_land1_${s}_0.1 $deep $fly1 $r8 --land_part=0.1 --seed=$s
    done
    run 12_land4_2_0.1 $long $fly --a=-0.0625 $r8 --land_part=0.1 --seed=2
    run 12_land8_2_0.1 $long $fly --a=-0.00390625 $r8 --land_part=0.1 --seed=2
    run 12_land1_5_0.1 $long $fly1 $r8 --land_part=0.1 --seed=5
    run 12_standard_5_0.1 $long --scheme=standard $r8 --land_part=0.1 --seed=5
    run 12_land_5_0.1 $long $fly $r8 --land_part=0.1 --seed=5
    landings 12_land_2 "0.05 0.02 0.005" $fly $r8 --seed=2
    run 12_flight_2 $long $fly $r8 --seed=2
    rates half "$r4"
    rates double "$r16"
    run 12_leapfrog_2_quarter $long --scheme=leapfrog --h=0.125 $r2 --seed=2
    run 24_leapfrog_2_quarter $deep --scheme=leapfrog --h=0.0625 $r2 --seed=2
    landed=$(ls -d out_*_land*/last.pt | grep -v flight | paste -sd,)
    [ -e $logs/as_standard.json ] || python evaluate.py --init_from=$landed --datasets=python \
        --block_size=128 --eval_windows=512 --batch_size=16 --as_standard=True --json=$logs/as_standard.json
}

# SmolLM2: 153,600 tokens of Debian's documents, and the losses of both texts
tune() {            # a name, the last step, and flags
    python train.py config/finetune_smollm2.py --dataset=debian --stored_layers=30 --block_size=512 \
        --batch_size=2 --dtype=bfloat16 --compile=True --learning_rate=5e-5 --min_lr=5e-6 --warmup_iters=10 \
        --lr_decay_iters=150 --eval_interval=1000 --log_interval=5 --max_iters=$2 --out_dir=out_tune_$1 \
        "${@:3}"
}
judge() {           # a name, and perhaps --as_standard=True: losses, the deployed model. Checkpoints go
    python evaluate.py --init_from=out_tune_$1/last.pt --datasets=debian,stdlib --block_size=512 \
        --eval_windows=24 --batch_size=4 --dtype=bfloat16 --json=$logs/tune_$1.json "${@:2}"
    rm -rf deployed/$1
    (cd deployed; python ../export.py ../out_tune_$1/last.pt $1 "${@:2}")   # no data there: measured above
    keep tune_$1
    rm out_tune_$1/*.pt
}
lands() {           # a name, the parts in which it lands, and flags: as landings() does from scratch
    for part in $2; do
        [ ! -e $logs/tune_$1_$part.csv ] || continue
        [ -e out_tune_$1_flight/last.pt ] || tune $1_flight 120 --min_lr=2.5e-5 "${@:3}"
        [ -e out_tune_$1_$part/last.pt ] || cp -rT out_tune_$1_flight out_tune_$1_$part
        tune $1_$part 150 "${@:3}" --land_part=$part --init_from=resume
        judge $1_$part --as_standard=True
    done
    rm -f out_tune_$1_flight/*.pt
}
bits() {            # the same, and before it a run that does not land
    [ -e $logs/tune_$1.csv ] || { tune $1 150 "${@:3}"; judge $1 --as_standard=True; }
    lands "$@"
}
a() { python -c "print(str([-1 / 2**int(bits) for bits in '$1']).replace(' ', ''))"; }

all="0.2 0.1 0.05"
high="--learning_rate=2e-4 --min_lr=1e-4"

tuned() {           # the bits of a layer, where they are not alike, are retrofit.py's (smollm2/tuned.txt)
    [ -e $logs/llamacpp.json ] || : "${CONVERTER:?is missing: see the head of results/landing.sh}"
    ln -sfn ../weights deployed/weights         # export.py needs the tokenizer
    [ -e $logs/tune_standard.csv ] || { tune standard 150; judge standard; }
    lands standard "$all" --scheme=standard
    for k in 8 4 2 1; do
        bits $k "$all" --bits=$k
    done
    bits 4spread "$all" --scheme=midpoint_a --a=$(a 084444444444444444444444442248)
    bits 2spread "$all" --scheme=midpoint_a --a=$(a 022222222242222222224221121124)
    ones=$(a 011111111111111111111111111112)
    bits 1spread "$all" --scheme=midpoint_a --a=$ones
    lands 1spreadhigh 0.1 --scheme=midpoint_a --a=$ones $high
    lands standardhigh 0.1 --scheme=standard $high
    [ -e $logs/int8.json ] || python results/int8.py debian \
        deployed/{standard,standard_0.1,8,4spread,4spread_0.1,1spread_0.1}
    [ -e $logs/llamacpp.json ] || python results/llamacpp.py "$CONVERTER" debian \
        deployed/{standard,8,4spread_0.1}
    for name in {standard,8,4spread,4,2spread,2,1spread,1}{,_0.2,_0.1,_0.05}; do
        [ -e $logs/piqa_$name.json ] || python evaluate.py --init_from=deployed/$name --tasks=piqa \
            --dtype=bfloat16 --json=$logs/piqa_$name.json
    done
}
"$@"
