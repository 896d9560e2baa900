# Landing on a standard model: every table of results/landing.md. A night on one core of a CPU. Run again, it
# keeps finished runs. The weights and texts of SmolLM2 are those of smollm2.sh, which makes them first.
#
#     pip install -r requirements.txt tokenizers
#     python data/python/prepare.py && OMP_NUM_THREADS=1 bash results/landing.sh scratch
#     OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 bash results/landing.sh tuned
set -eu
logs=results/landing
mkdir -p $logs deployed
keep() { cut -d, -f1,2,6,11 out_$1/log.csv > $logs/$1.csv; }            # step, loss, |a|, validation loss

run() {             # a run from scratch: its name, and flags. At its end it says the loss as the standard net
    [ ! -e $logs/$1.csv ] || return 0
    from=scratch
    [ ! -e out_$1/last.pt ] || from=resume
    python train.py config/compare.py --gelu=tanh --compile=True --log_interval=5 --out_dir=out_$1 \
        --init_from=$from "${@:2}"
    keep $1
}
fly="--scheme=midpoint_a --a=-1 --h=once"
r8="--learning_rate=8e-3 --min_lr=8e-4"
r4="--learning_rate=4e-3 --min_lr=4e-4"
long="--eval_interval=1172"
deep="--n_layer=24 --stored_layers=24 --max_iters=732 --eval_interval=586"

scratch() {
    for s in 2 3 4; do
        run 12_land_$s $long $fly $r8 --land_part=0.1 --seed=$s
        run 12_standard_$s $long --scheme=standard $r8 --seed=$s
        run 24_land_$s $deep $fly $r8 --land_part=0.1 --seed=$s
        run 24_standard_$s $deep --scheme=standard $r8 --seed=$s
    done
    run 12_land_2_half $long $fly $r4 --land_part=0.1 --seed=2
    run 24_land_2_half $deep $fly $r4 --land_part=0.1 --seed=2
    run 24_standard_2_half $deep --scheme=standard $r4 --seed=2
    # one flight of four fifths, then landings of several lengths; other rates at the end; a longer landing
    run 12_flight $long $fly $r8 --seed=2 --max_iters=1172 --lr_decay_iters=1465
    for part in 0.2 0.1 0.05 0.02 0.005 0; do
        [ -e out_12_part_$part ] || cp -r out_12_flight out_12_part_$part
        run 12_part_$part $long $fly $r8 --seed=2 --lr_decay_iters=1465 --land_part=$part
    done
    run 12_land_2_up $long $fly --learning_rate=8e-3 --min_lr=4e-3 --seed=2 --land_part=0.1
    for s in 2 3 4; do
        run 12_land_${s}_50 $long $fly $r8 --land_part=0.5 --seed=$s
    done
}

# SmolLM2: 153,600 tokens of Debian's documents, and the losses of both texts
tune() {            # a name, the last step, and flags
    python train.py config/finetune_smollm2.py --dataset=debian --stored_layers=30 --block_size=512 \
        --batch_size=2 --dtype=bfloat16 --compile=True --learning_rate=5e-5 --min_lr=5e-6 --warmup_iters=10 \
        --lr_decay_iters=150 --eval_interval=1000 --log_interval=5 --max_iters=$2 --out_dir=out_tune_$1 \
        "${@:3}"
}
judge() {           # a name, and perhaps --as_standard=True: losses, and the deployed model
    python evaluate.py --init_from=out_tune_$1/last.pt --datasets=debian,stdlib --block_size=512 \
        --eval_windows=24 --batch_size=4 --dtype=bfloat16 --json=$logs/tune_$1.json "${@:2}"
    python export.py out_tune_$1/last.pt deployed/$1 "${@:2}"
    keep tune_$1
}
bits() {            # a name, the parts in which it lands, and flags. What lands leaves the run that does not
    [ ! -e $logs/tune_$1.csv ] || return 0
    tune $1 120 "${@:3}"
    for part in $2; do
        steps=$(python -c "print(150 - round(150 * $part))")
        tune $1 $steps --init_from=resume "${@:3}"
        cp -r out_tune_$1 out_tune_$1_$part
        tune $1_$part 150 --init_from=resume "${@:3}" --land_part=$part
        judge $1_$part --as_standard=True
    done
    tune $1 150 --init_from=resume "${@:3}"
    judge $1 --as_standard=True
}

tuned() {
    [ -e $logs/tune_standard.csv ] || { tune standard 150; judge standard; }
    [ -e $logs/tune_8.csv ] || { tune 8 150 --bits=8; judge 8 --as_standard=True; }
    bits 4 0.1 --bits=4
    # 1 bit on average, as retrofit.py spreads it: none in the first layer, two in the last
    one=$(python -c "print(str([-1.0] + 28 * [-0.5] + [-0.25]).replace(' ', ''))")
    bits 1spread "0.2 0.1 0.05" --scheme=midpoint_a --a=$one
}
$1
