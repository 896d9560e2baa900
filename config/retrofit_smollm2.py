"""
SmolLM2 (135M) made reversible, with no bit remembered; --bits=1 remembers one, and stays much closer to the original.

    pip install tokenizers
    python data/text/prepare.py TEXT --tokenizer=HuggingFaceTB/SmolLM2-135M             # TEXT: files or folders of yours
    python retrofit.py config/retrofit_smollm2.py
    python retrofit.py config/retrofit_smollm2.py --teacher=HuggingFaceTB/SmolLM2-360M  # with data encoded for it

131,072 tokens a step = 8 sequences x 1024 tokens x 16 micro-batches; 262M in all.
"""
out_dir = 'out_retrofit_smollm2'
teacher = 'HuggingFaceTB/SmolLM2-135M'
dataset = 'text'
batch_size = 8
gradient_accumulation_steps = 16
block_size = 1024

learning_rate = 3e-4
min_lr = 1e-5
max_iters = 2000
warmup_iters = 100
eval_interval = 250
eval_windows = 400
compile = True
