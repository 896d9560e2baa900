"""
A standard GPT on the source code of Python's standard library: the teacher of config/retrofit_python.py.

    python data/python/prepare.py && python train.py config/python_teacher.py           # minutes on a CPU

2048 tokens per step = 16 sequences x 128 bytes; 2.9M in all. 1.6M parameters.
"""
out_dir = 'out_python_teacher'
dataset = 'python'
batch_size = 16
gradient_accumulation_steps = 1
block_size = 128
scheme = 'standard'
n_layer = 8
n_head = 4
n_embd = 128

learning_rate = 2e-3
min_lr = 1e-4
max_iters = 1400
warmup_iters = 100
beta2 = 0.99
eval_windows = 512
log_interval = 100
dtype = 'bfloat16'      # half as long again in float32
