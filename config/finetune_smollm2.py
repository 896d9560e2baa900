"""
SmolLM2-135M, fine-tuned on text of your own as a reversible model from the first step, without a retrofit.

    pip install tokenizers
    python data/text/prepare.py my.txt --tokenizer=HuggingFaceTB/SmolLM2-135M-Instruct
    python train.py config/finetune_smollm2.py --bits=4         # without --bits: the standard model

102,400 tokens = 25 steps of 4 sequences x 1024.
"""
init_from = 'HuggingFaceTB/SmolLM2-135M-Instruct'
out_dir = 'out_finetune'
dataset = 'text'
block_size = 1024
batch_size = 4
gradient_accumulation_steps = 1
slice_tokens = 1024     # f sees one sequence at a time: on a CPU more would only take memory

learning_rate = 1e-4
min_lr = 0.0
max_iters = 25
warmup_iters = 3
eval_interval = 5
eval_windows = 24
log_interval = 1
