"""
TinyLlama (1.1B) made reversible, with two bits per element and layer, on text of your own.

    pip install tokenizers
    python data/text/prepare.py TEXT --tokenizer=TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T
    torchrun --standalone --nproc_per_node=8 retrofit.py config/retrofit_tinyllama.py

131,072 tokens per step = 4 sequences x 2048 tokens x 16 micro-batches; 262M in all. In float32 weights,
gradients, AdamW's moments and the teacher take 20 bytes per parameter, 22 GB.
"""
out_dir = 'out_retrofit_tinyllama'
teacher = 'TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T'
bits = 2
dataset = 'text'
batch_size = 4
gradient_accumulation_steps = 16
block_size = 2048
learning_rate = 1e-4
min_lr = 1e-5
max_iters = 2000
warmup_iters = 100
eval_interval = 250
eval_windows = 200
compile = True
