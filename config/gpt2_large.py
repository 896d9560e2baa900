"""
GPT-2 large (774M) on OpenWebText: the standard baseline of gpt2_large_rev.py.

    python data/openwebtext/prepare.py
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2_large.py

491,520 tokens per step = 4 sequences x 1024 tokens x 120 micro-batches (15 on each of 8 GPUs); 295B in all.
nanoGPT has none of this size: the learning rate is GPT-3's for 760M (arXiv 2005.14165, table 2.1).
"""
out_dir = 'out_gpt2_large'
dataset = 'openwebtext'
batch_size = 4
gradient_accumulation_steps = 120
block_size = 1024
scheme = 'standard'
n_layer = 36
n_head = 20
n_embd = 1280
learning_rate = 2.5e-4
min_lr = 2.5e-5
max_iters = 600000
warmup_iters = 2000
eval_interval = 1000
compile = True
stored_layers = 'auto'  # as many as fit into the GPU's memory: the gradients are the same, bit for bit
