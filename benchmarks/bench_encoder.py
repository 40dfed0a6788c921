"""The forward of a BERT encoder on ragged batches against padded Hugging Face BERT with SDPA, and its compiled form.

BERT base: 12 layers (2 on a CPU), d 768, 12 heads, feed-forward 3072; lengths uniform in [S / 5, S], seeded.
"""

import torch

from benchmarks import encoders

OP = "encoder"
GPU_SHAPES = tuple((batch, longest) for batch in (1, 8, 16) for longest in (64, 128, 256, 512, 1024))
CPU_SHAPES = ((1, 128), (8, 128), (8, 512))
QUICK_SHAPES = ((3, 24),)
BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
QUICK = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 100}


def cases(device, quick):
    from transformers import BertConfig

    on_gpu = device.type == "cuda"
    shapes = QUICK_SHAPES if quick else GPU_SHAPES if on_gpu else CPU_SHAPES
    sizes = QUICK if quick else BASE
    config = BertConfig(**sizes, num_hidden_layers=12 if on_gpu else 2, max_position_embeddings=1024)
    dtype = torch.float16 if on_gpu else torch.float32
    for batch, longest in shapes:
        yield encoders.make_case(config, batch, longest, dtype, device, "sdpa")


PROVIDERS = (
    ("flowattn", encoders.flowattn_capacity),
    ("flowattn captured", encoders.flowattn_captured),
    ("flowattn exact", encoders.flowattn_eager),
    ("Hugging Face SDPA", encoders.hugging_face),
    ("Hugging Face SDPA, torch.compile", encoders.hugging_face_compiled),
)
MINE = ("flowattn", "flowattn captured", "flowattn exact")
NOTE = (
    "Batches are padded to their longest sequence. flowattn has a capacity, the tokens rounded up to 128; exact counts "
    "them on the host; captured is PaddingFreeEncoder.capture with its copies of the inputs."
)
