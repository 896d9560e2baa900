"""
GPT-2 small (124M) on OpenWebText with nanoGPT's hyperparameters: the standard baseline of gpt2_rev.py.

    python data/openwebtext/prepare.py
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2.py

491,520 tokens per step = 12 sequences x 1024 tokens x 40 micro-batches (5 on each of 8 GPUs); 295B in all.
"""
out_dir = 'out_gpt2'
dataset = 'openwebtext'
batch_size = 12
gradient_accumulation_steps = 40
block_size = 1024
scheme = 'standard'
n_layer = 12
n_head = 12
n_embd = 768
learning_rate = 6e-4
min_lr = 6e-5
max_iters = 600000
warmup_iters = 2000
eval_interval = 1000
compile = True
stored_layers = 'auto'  # as many as fit into the GPU's memory: the gradients are the same, bit for bit
