# Every row that is still open on a GPU, most important first, then the figures:  bash results/gpu.sh
# A row whose file exists is skipped, so a second run continues where the first one stopped.
set -u
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True         # or gaps between tensors count as memory
row() {                                                         # name, then the command
    [ -e "results/$1.json" ] || python ${*:2} --json="results/$1.json"
}

GPT2="--shape=gpt2 --compile=True"
LARGE="--shape=gpt2-large --compile=True"
DEEP="--n_layer=96 --n_head=8 --n_embd=512 --vocab_size=50304 --block_size=1024 --compile=True"
SIZE="--n_layer=12 --n_head=12 --n_embd=768 --vocab_size=50304 --block_size=1024"
CASES=standard,checkpointed,midpoint,leapfrog,symplectic
ALL=standard,standard/half,checkpointed
for scheme in midpoint leapfrog symplectic midpoint_a midpoint_sum; do
    ALL=$ALL,$scheme,$scheme/half,$scheme/all,$scheme/float,$scheme/dial
done
LEAN=standard,checkpointed,checkpointed/sliced,checkpointed/bf16,checkpointed/host,midpoint,leapfrog,symplectic

row drift_gpu results/drift.py --compile=True $SIZE --batch_size=4
row throughput_gpu bench.py throughput $GPT2 --batch_size=12 --cases=$ALL
row batch_gpu bench.py batch $GPT2 --cases=$LEAN --budget_gb=[24,40,48,80]
row throughput_largest_gpt2_gpu bench.py throughput $GPT2 --cases=$CASES --budget_gb=[24,80]
row batch_large_gpu bench.py batch $LARGE --cases=$LEAN --budget_gb=[24,40,80]
row throughput_dial_36_gpu bench.py throughput $LARGE --batch_size=8 --cases=$CASES,leapfrog/dial
row throughput_largest_gpt2-large_gpu bench.py throughput $LARGE --cases=$CASES --budget_gb=[24,80]
row throughput_largest_96_gpu bench.py throughput $DEEP --cases=$CASES --budget_gb=[24,80]
row length_gpu bench.py length $GPT2 --budget_gb=[24,80] --cases=$LEAN,checkpointed/bf16/tiled
row depth_gpu bench.py depth $GPT2 --layers=[2,4,8,12,24]
row batch_whole_loss_gpu bench.py batch $GPT2 --cases=$LEAN --budget_gb=[24,40,48,80] --chunked_loss=False
python assets/figures.py
