"""The forward of DeBERTa v3 on ragged batches against padded Hugging Face, which has one implementation, the eager one.

v3 base: 12 layers (2 on a CPU), d 768, 12 heads, feed-forward 3072, 256 position buckets; a smaller vocabulary, since
embedding takes the same time. Lengths uniform in [S / 5, S], seeded.
"""

import torch

from benchmarks import encoders

OP = "deberta"
GPU_SHAPES = tuple((batch, longest) for batch in (1, 8, 16) for longest in (128, 256, 512))
CPU_SHAPES = ((1, 128), (8, 128), (4, 512))
QUICK_SHAPES = ((3, 24),)
BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "vocab_size": 30000}
QUICK = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 100}
BUCKETS = 256


def cases(device, quick):
    from transformers import DebertaV2Config

    on_gpu = device.type == "cuda"
    sizes = QUICK if quick else BASE
    config = DebertaV2Config(
        **sizes, num_hidden_layers=12 if on_gpu else 2, relative_attention=True, position_buckets=BUCKETS,
        max_relative_positions=512, pos_att_type="p2c|c2p", share_att_key=True, norm_rel_ebd="layer_norm",
        position_biased_input=False, type_vocab_size=0,
    )  # fmt: skip
    width, rows = config.hidden_size, 2 * BUCKETS

    def position_flops(lengths):
        """Both tables from the embeddings, and their product with each row, for the distances that it has."""
        return 2 * (2 * rows * width**2 + 2 * width * sum(n * min(n, rows) for n in lengths))

    for batch, longest in QUICK_SHAPES if quick else GPU_SHAPES if on_gpu else CPU_SHAPES:
        dtype = torch.float16 if on_gpu else torch.float32
        yield encoders.make_case(config, batch, longest, dtype, device, "eager", position_flops)


PROVIDERS = (
    ("flowattn", encoders.flowattn_capacity),
    ("flowattn captured", encoders.flowattn_captured),
    ("flowattn exact", encoders.flowattn_eager),
    ("Hugging Face", encoders.hugging_face),
    ("Hugging Face, torch.compile", encoders.hugging_face_compiled),
)
MINE = ("flowattn", "flowattn captured", "flowattn exact")
NOTE = (
    "Batches are padded to their longest sequence. flowattn has a capacity, the tokens rounded up to 128; exact counts "
    "them on the host; captured is PaddingFreeEncoder.capture with its copies of the inputs. The floor counts no "
    "position term twice, though tiles do at their edges."
)
