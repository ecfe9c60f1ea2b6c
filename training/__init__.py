"""Fine-tuning: data, collators and trainers over the Hugging Face Trainer."""
