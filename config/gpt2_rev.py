"""
A reversible GPT-2 small (124M) on OpenWebText, with the hyperparameters of gpt2.py and the same data at every step.

    python data/openwebtext/prepare.py
    torchrun --standalone --nproc_per_node=8 train.py config/gpt2_rev.py

491,520 tokens per step = 60 sequences x 1024 tokens x 8 micro-batches (1 on each of 8 GPUs); 295B tokens in all. The
memory that activations no longer take goes into a micro-batch five times as large as that of gpt2.py.
"""
out_dir = 'out_gpt2_rev'
dataset = 'openwebtext'
batch_size = 60
gradient_accumulation_steps = 8
block_size = 1024

scheme = 'leapfrog'     # this and h are the defaults: see results/schemes.md
h = 0.25
n_layer = 12
n_head = 12
n_embd = 768

learning_rate = 6e-4
min_lr = 6e-5
max_iters = 600000
warmup_iters = 2000
weight_decay = 0.1
eval_interval = 1000
eval_windows = 2400
compile = True
slice_tokens = 32768    # 8192, the default, is probably too little work at this width: an H100 would wait for its host
stored_layers = 'auto'  # as many as fit into the GPU's memory: the gradients are the same, bit for bit
