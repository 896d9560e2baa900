"""
All conversions of retrofit.py, two seeds, from the teacher of config/python.py, which is trained if there is none. The
tuning takes a quarter of the teacher's steps, each of as many tokens.

    python data/python/prepare.py && python retrofit.py config/retrofit_table.py

2048 tokens per step = 8 sequences x 256 bytes; 1.5M in all. 2.5M parameters.
"""
out_dir = 'out_retrofit_table'
teacher = 'out_python_standard/best.pt'
teacher_config = 'config/python.py'
conversion = 'all'
seeds = [1, 2]

dataset = 'python'
batch_size = 8
gradient_accumulation_steps = 1
block_size = 256

learning_rate = 1e-3
min_lr = 1e-5
max_iters = 750
warmup_iters = 20
beta2 = 0.99
eval_interval = 750
eval_windows = 512
log_interval = 50
stored_layers = 8       # all: there is memory to spare here, and the gradients are the same, bit for bit
dtype = 'bfloat16'
