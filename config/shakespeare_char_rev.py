"""
nanoGPT's baby GPT on Tiny Shakespeare, one token per character, as a reversible model.

    python data/shakespeare_char/prepare.py && python train.py config/shakespeare_char_rev.py

16,384 tokens per step = 64 sequences x 256 characters; 82M in all, 82 times the text. 10.7M parameters.
"""
out_dir = 'out_shakespeare_char'
dataset = 'shakespeare_char'
batch_size = 64
gradient_accumulation_steps = 1
block_size = 256
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
learning_rate = 1e-3
min_lr = 1e-4
max_iters = 5000
warmup_iters = 100
beta2 = 0.99
eval_interval = 250
eval_windows = 400
