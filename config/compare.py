"""
The short comparison of schemes whose table is in RESULTS.md: 12 layers, equal tokens, one seed a run.

    python train.py config/compare.py --scheme=leapfrog --h=0.25 --seed=1 --out_dir=out_compare_leapfrog_h0.25

2048 tokens a step, 1.6M in all; 0.6M parameters. All layers are stored, for speed: the gradients are the same bits.
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
max_iters = 800
warmup_iters = 80
beta2 = 0.99
eval_interval = 200
eval_windows = 1024
log_interval = 100
