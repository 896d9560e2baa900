"""
SmolLM2-135M made reversible, with two bits per element on average, as in a table of results/conversion.md.

    pip install tokenizers
    python data/text/prepare.py TEXT --tokenizer=HuggingFaceTB/SmolLM2-135M-Instruct    # files or folders
    python retrofit.py config/retrofit_smollm2.py                                       # or with --bits=1.5

1024 tokens per step = 4 sequences x 256; 150,528 in all: 50 minutes on one core of a CPU, 8 GB.
"""
out_dir = 'out_retrofit_smollm2'
teacher = 'HuggingFaceTB/SmolLM2-135M-Instruct'
bits = 2
spread_windows = 2
anneal_part = 0.0       # no annealing: with 1 to 2 bits the student begins near enough to its teacher
dataset = 'text'
batch_size = 4
gradient_accumulation_steps = 1
block_size = 256
learning_rate = 1e-4    # 2e-4 gains 0.003 nats in 30 steps, 5e-4 diverges
min_lr = 0.0
max_iters = 147
warmup_iters = 5
eval_interval = 49
eval_windows = 48
stored_layers = 30      # all: there is memory to spare here, and the gradients are the same, bit for bit
