"""
A run of the comparison of schemes: 12 layers, 3.0M tokens, 0.6M parameters. All of them: results/compare.py.

    python train.py config/compare.py --scheme=leapfrog --h=0.25 --seed=1 --out_dir=out_compare_one

2048 tokens per step = 16 sequences x 128 bytes. All layers are stored, for speed: the gradients are the same.
"""
dataset = 'python'
batch_size = 16
gradient_accumulation_steps = 1
block_size = 128
n_layer = 12
n_head = 2
n_embd = 64
stored_layers = 12
learning_rate = 2e-3
min_lr = 2e-4
max_iters = 1465
warmup_iters = 100
beta2 = 0.99
eval_interval = 488
eval_windows = 512
log_interval = 100
