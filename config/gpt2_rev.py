"""
A reversible GPT-2 small (124M) on OpenWebText, with the hyperparameters of gpt2.py and the same data.

    python data/openwebtext/prepare.py
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2_rev.py

491,520 tokens per step = 60 sequences x 1024 tokens x 8 micro-batches (1 on each of 8 GPUs); 295B in all.
"""
out_dir = 'out_gpt2_rev'
dataset = 'openwebtext'
batch_size = 60
gradient_accumulation_steps = 8
block_size = 1024
scheme = 'leapfrog'     # with h = 0.25, the default: see results/schemes.md
n_layer = 12
n_head = 12
n_embd = 768
learning_rate = 6e-4
min_lr = 6e-5
max_iters = 600000
warmup_iters = 2000
eval_interval = 1000
compile = True
slice_tokens = 32768    # with 8192, the default, an H100 would probably wait for its host at this width
stored_layers = 'auto'  # as many as fit into the GPU's memory: the gradients are the same, bit for bit
