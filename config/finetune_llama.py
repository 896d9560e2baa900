"""
Llama-2 7B, fine-tuned on text of your own as a reversible model, its weights split over eight GPUs (FSDP2).

    pip install tokenizers
    python data/text/prepare.py my.txt --tokenizer=meta-llama/Llama-2-7b-hf         # gated: set HF_TOKEN
    torchrun --standalone --nproc_per_node=8 train.py config/finetune_llama.py

On two machines of eight GPUs, which share out_dir, this line on each:

    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=FIRST_MACHINE:29500 \
        --rdzv_id=NAME train.py config/finetune_llama.py --gradient_accumulation_steps=16

262,144 tokens per step = 8 GPUs x 16 sequences x 2048: 21 GB are counted on each GPU, without CUDA itself. A
checkpoint takes 81 GB on the disk, and in the main memory of the first machine. Not tried: we had no GPU.
"""
init_from = 'meta-llama/Llama-2-7b-hf'
out_dir = 'out_finetune_llama'
dataset = 'text'
bits = 4
shard = True
block_size = 2048
batch_size = 16
gradient_accumulation_steps = 8         # 1 on each of 8 GPUs: with shards every micro-batch sends gradients
slice_tokens = 2048     # at this width a slice of one sequence keeps a GPU busy
compile = True

learning_rate = 2e-5
min_lr = 0.0
max_iters = 100
warmup_iters = 10
weight_decay = 0.0
eval_interval = 25      # each writes a checkpoint
eval_windows = 64
log_interval = 1
