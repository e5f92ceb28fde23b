"""What labels can read off features: kNN, linear, logistic, attentive, few-shot, fine-tuned, dense, retrieval."""
