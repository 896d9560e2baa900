"""
The quick start: a small reversible GPT on the source code of Python's standard library, one byte per token.

    python data/python/prepare.py && python train.py config/python_rev.py

1024 tokens per step = 8 sequences x 128 tokens; 1.5M in all, a seventh of the text. 0.8M parameters.
"""
out_dir = 'out_python'
dataset = 'python'
batch_size = 8
gradient_accumulation_steps = 1
block_size = 128
h = 0.5                 # did better in this shape than the default, 0.25, in one run: see results/schemes.md
n_layer = 4
n_head = 4
n_embd = 128
rope_theta = 1e4        # rotary positions: a loss of 1.78 instead of 2.11 after 600 steps, in one run each
learning_rate = 4e-3
min_lr = 1e-4
max_iters = 1500
warmup_iters = 100
beta2 = 0.99
eval_interval = 1500
eval_windows = 512
log_interval = 250
