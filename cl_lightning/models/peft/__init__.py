"""Parameter-efficient fine-tuning (PEFT) modules for pretrained models, one file per mechanism."""
