"""
GPT-2 (124M) made reversible, with two bits per element and layer.
--bits=0 keeps none, which is much harder: see results/conversion.md.

    python data/openwebtext/prepare.py --subsets=1
    torchrun --standalone --nproc_per_node=8 retrofit.py config/retrofit_gpt2.py    # or python retrofit.py
    python sample.py --init_from=out_retrofit_gpt2/last.pt

131,072 tokens per step = 16 sequences x 1024 tokens x 8 micro-batches; 262M in all.
"""
out_dir = 'out_retrofit_gpt2'
teacher = 'gpt2'
bits = 2
dataset = 'openwebtext'
batch_size = 16
gradient_accumulation_steps = 8
block_size = 1024

learning_rate = 3e-4
min_lr = 1e-5
max_iters = 2000
warmup_iters = 100
eval_interval = 250
eval_windows = 400
compile = True
