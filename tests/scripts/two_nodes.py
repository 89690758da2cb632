"""Trains with the Trainer, and writes how many processes there were and how many of them here."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import hf_tiny
from transformers import HfArgumentParser, Trainer, TrainingArguments

(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
trainer = Trainer(hf_tiny.model(), args, train_dataset=hf_tiny.Pairs())
trainer.train()
if trainer.is_world_process_zero():
    seen = {"processes": args.world_size, "here": os.environ["LOCAL_WORLD_SIZE"], "steps": trainer.state.global_step}
    seen["optimizer"] = type(trainer.optimizer.optimizer).__name__
    Path(args.output_dir, "seen.json").write_text(json.dumps(seen))
