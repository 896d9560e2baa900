# What to measure on a GPU, most telling first: 15 minutes on one H100. States are int32.
#
#     git clone https://github.com/karpathy/nanoGPT     # two rows time its model; elsewhere: NANOGPT=folder
#     bash results/gpu.sh tiny                          # a dry run on a CPU: tiny shapes, in out_gpu_tiny/
#     bash results/gpu.sh                               # files in results/; elsewhere: OUT=folder
#
# Each row has its seconds. It writes its lines, as soon as it has them, to ROW.unfinished. When it is done,
# this file becomes ROW.json. A row that is killed, or fails, keeps its lines under the first name. A second
# call skips the rows that are done, and begins the others again. TIMES=4 gives every row four times as long.
set -u
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True         # or gaps between tensors count as memory
trap exit INT                           # Ctrl-C ends all of it, not only one row

GPT2=--shape=gpt2
SIZE="--n_layer=12 --n_head=12 --n_embd=768 --vocab_size=50304 --block_size=1024 --batch_size=4"
COMPILE=--compile=True
LLAMA=("--shape=Llama-2 7B" --batch_size=16 --device=cuda)
DEPTHS=[2,6,12,24]
CARD=24                                 # GB
OUT=${OUT:-results}
NANOGPT=${NANOGPT:-nanoGPT}
if [ "${1:-}" = tiny ]; then
    SIZE="--n_layer=1 --n_head=1 --n_embd=8 --vocab_size=16 --block_size=8 --batch_size=2 --device=cpu"
    GPT2="$SIZE --slice_tokens=64 --repeats=1"
    COMPILE=--compile=False
    LLAMA=(--n_layer=1 --n_embd=32 --batch_size=1)
    DEPTHS=[1,2]
    CARD=0.0005
    [ "$OUT" = results ] && OUT=out_gpu_tiny
fi
[ -e "$NANOGPT/model.py" ] || echo "there is no $NANOGPT/model.py, so two rows will fail" >&2

row() {                                 # name, seconds, command
    [ -e "$OUT/$1.json" ] && return
    echo "$1: up to $((${TIMES:-1} * $2)) s" >&2
    timeout --foreground --kill-after=10 $((${TIMES:-1} * $2)) python "${@:3}" --json="$OUT/$1.unfinished" &&
        mv "$OUT/$1.unfinished" "$OUT/$1.json"
}

# bit for bit: gradients of stored and of rebuilt states, compiled, with deterministic kernels
row drift_gpu 80 results/drift.py --schemes=leapfrog --dtypes=bfloat16 $COMPILE $SIZE
# time at equal batch
row throughput_gpu 170 bench.py throughput --cases=nanogpt,standard,checkpointed,leapfrog \
    "--nanogpt=$NANOGPT/model.py" $COMPILE --batch_size=12 --repeats=5 $GPT2
# the largest batch: eager, as what is counted; compiled, each batch that is tried would be compiled anew
row batch_gpu 90 bench.py batch --cases=standard,checkpointed,checkpointed/bf16,leapfrog --budget_gb=24 $GPT2
# time at the largest batch: that which is counted, so nothing is searched for
row throughput_largest_gpt2_gpu 180 bench.py throughput --cases=nanogpt,checkpointed,leapfrog \
    "--nanogpt=$NANOGPT/model.py" $COMPILE --search=False --budget_gb=$CARD --repeats=1 $GPT2
# the longest context: in 8 GB, since attention over the 546,304 tokens that fit 24 GB takes a minute per step
row length_gpu 70 bench.py length --budget_gb=8 \
    --cases=standard,checkpointed,checkpointed/bf16/tiled,leapfrog $GPT2
# --shard: NCCL wants a card for each process, so this is one of eight, and the others do not exist
row sharded_gpu 40 results/sharded.py --processes=8 "${LLAMA[@]}"
# memory against depth
row depth_gpu 40 bench.py depth --layers=$DEPTHS \
    --cases=standard,checkpointed,checkpointed/sliced,checkpointed/bf16,checkpointed/host,leapfrog $GPT2
# the states alone, bit for bit, with the kernels that training takes
row drift_training_gpu 60 results/drift.py --deterministic=False --schemes=leapfrog,midpoint_a,symplectic \
    --dtypes=bfloat16 $COMPILE $SIZE
# time at equal batch of leaner checkpointing, all layers stored, and float states
row throughput_rivals_gpu 60 bench.py throughput $COMPILE --batch_size=12 --repeats=5 \
    --cases=standard,checkpointed/bf16,checkpointed/host,leapfrog,leapfrog/all,leapfrog/float $GPT2
# the largest batch again: a step of leapfrog's takes half a minute here
row batch_80_gpu 110 bench.py batch --cases=leapfrog,standard,checkpointed --budget_gb=80 $GPT2

if [ "$OUT" = results ]; then
    python assets/figures.py            # needs matplotlib
fi
