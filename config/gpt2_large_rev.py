"""
A reversible GPT-2 large (774M) on OpenWebText, with the hyperparameters of gpt2_large.py and the same data.

    python data/openwebtext/prepare.py
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2_large_rev.py

491,520 tokens per step = 30 sequences x 1024 tokens x 16 micro-batches (2 on each of 8 GPUs); 295B in all.
"""
out_dir = 'out_gpt2_large_rev'
dataset = 'openwebtext'
batch_size = 30
gradient_accumulation_steps = 16
block_size = 1024
scheme = 'leapfrog'     # with h = 0.25, the default: see results/schemes.md
n_layer = 36
n_head = 20
n_embd = 1280
learning_rate = 2.5e-4
min_lr = 2.5e-5
max_iters = 600000
warmup_iters = 2000
eval_interval = 1000
compile = True
slice_tokens = 16384    # at this width fewer tokens than in gpt2_rev.py keep an H100 at work
stored_layers = 'auto'  # as many as fit into the GPU's memory: the gradients are the same, bit for bit
