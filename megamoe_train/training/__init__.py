"""The training job behind `python -m megamoe_train.pretrain`: data, launch, checks, progress."""
