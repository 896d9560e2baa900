"""
A demonstration of retrofit.py without any download: a byte-level model of 8 layers becomes reversible, with
one bit per element and layer, or with none: --bits=0.

    python data/python/prepare.py
    python train.py config/python_teacher.py && python retrofit.py config/retrofit_python.py

2048 tokens per step = 16 sequences x 128 bytes; 0.6M in all.
"""
out_dir = 'out_retrofit_python'
teacher = 'out_python_teacher/best.pt'
bits = 1
dataset = 'python'
batch_size = 16
gradient_accumulation_steps = 1
block_size = 128

learning_rate = 1e-3
max_iters = 300
warmup_iters = 20
beta2 = 0.99
eval_windows = 512
log_interval = 50
stored_layers = 8       # all: there is memory to spare here, and the gradients are the same, bit for bit
dtype = 'bfloat16'
