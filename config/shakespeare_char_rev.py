"""
A reversible GPT on the characters of Shakespeare, with the size and hyperparameters of nanoGPT's example.

    python data/shakespeare_char/prepare.py
    python train.py config/shakespeare_char_rev.py              # a GPU: add --compile=True; a CPU needs hours
    python sample.py --init_from=out_shakespeare_char/best.pt

16,384 tokens per step = 64 sequences x 256 characters; 82M in all, 82 times the text, hence the dropout.
"""
out_dir = 'out_shakespeare_char'
dataset = 'shakespeare_char'
batch_size = 64
gradient_accumulation_steps = 1
block_size = 256
scheme = 'leapfrog'     # with h = 0.25, the default: see results/schemes.md
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
