# Every row that is still open on a GPU, most important first, then the figures:  bash results/gpu.sh
# A row whose file exists is skipped, so a second run continues where the first one stopped.
set -u
row() { [ -e "results/$1.json" ] || python ${*:2} --json="results/$1.json"; }     # name, then the command

SMALL="--shape=gpt2 --compile=True"
CASES=standard,checkpointed,midpoint,leapfrog,symplectic
LEAN=standard,checkpointed,checkpointed/sliced,checkpointed/bf16,leapfrog       # the kinds of checkpointing
row drift_gpu results/drift.py --compile=True --n_layer=12 --n_head=12 --n_embd=768 --vocab_size=50304 --block_size=1024 --batch_size=4
row throughput_gpu bench.py throughput $SMALL --batch_size=12
row batch_gpu bench.py batch $SMALL --budget_gb=[24,40,48,80]
row throughput_largest_gpt2_gpu bench.py throughput $SMALL --cases=$CASES --budget_gb=[24,80]
row batch_large_gpu bench.py batch --shape=gpt2-large --compile=True --budget_gb=[24,40,80]
row throughput_dial_36_gpu bench.py throughput --shape=gpt2-large --compile=True --batch_size=8 --cases=standard,checkpointed,leapfrog,leapfrog/dial
row throughput_largest_gpt2-large_gpu bench.py throughput --shape=gpt2-large --compile=True --cases=$CASES --budget_gb=[24,80]
row throughput_largest_96_gpu bench.py throughput --n_layer=96 --n_head=8 --n_embd=512 --vocab_size=50304 --block_size=1024 --compile=True --cases=$CASES --budget_gb=[24,80]
row length_gpu bench.py length $SMALL --cases=$LEAN --budget_gb=[24,80]
row depth_gpu bench.py depth $SMALL --cases=$LEAN --layers=[2,4,8,12,24]
row batch_whole_loss_gpu bench.py batch $SMALL --budget_gb=[24,40,48,80] --chunked_loss=False
python assets/figures.py
