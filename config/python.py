"""
A standard GPT on the source code of Python's standard library, larger than config/python_teacher.py's.

    python data/python/prepare.py && python train.py config/python.py

2048 tokens per step = 8 sequences x 256 bytes; 6.1M in all. 2.5M parameters.
"""
out_dir = 'out_python_standard'
dataset = 'python'
batch_size = 8
gradient_accumulation_steps = 1
block_size = 256
scheme = 'standard'
n_layer = 8
n_head = 5
n_embd = 160
learning_rate = 2e-3
min_lr = 1e-4
max_iters = 3000
warmup_iters = 200
beta2 = 0.99
eval_interval = 1000
eval_windows = 512
log_interval = 100
dtype = 'bfloat16'      # half as long again in float32
