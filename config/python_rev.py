"""
The quick start: a small reversible GPT on the source code of Python's standard library, one byte a token.

    python data/python/prepare.py && python train.py config/python_rev.py

4096 tokens a step (32 sequences of 128), 0.8M parameters.
"""
out_dir = 'out_python'
dataset = 'python'
batch_size = 32
gradient_accumulation_steps = 1
block_size = 128

scheme = 'leapfrog'
n_layer = 4
n_head = 4
n_embd = 128

learning_rate = 4e-3
min_lr = 4e-4
max_iters = 1000
warmup_iters = 50
beta2 = 0.99
eval_interval = 500
eval_windows = 512
log_interval = 50
