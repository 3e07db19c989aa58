"""The table of named models, which is read without importing torch; `sequencer.variants` registers them with timm.

Numbers beside a name are parameters at 1,000 classes.
"""

from typing import Any, Literal, NamedTuple


class Variant(NamedTuple):
    """A named model: its class in `sequencer.models`, its arguments, and the images that it is meant for."""

    model: Literal["Sequencer2d", "VSequencer"]
    args: dict[str, Any]
    img_size: int = 224
    in_chans: int = 3


S = {
    "layers": (4, 3, 8, 3),
    "patch_sizes": (7, 2, 1, 1),
    "embed_dims": (192, 384, 384, 384),
    "hidden_sizes": (48, 96, 96, 96),
}
M = S | {"layers": (4, 3, 14, 3)}
L = S | {"layers": (8, 8, 16, 4)}
S_H2X = S | {"hidden_sizes": (96, 192, 192, 192)}
V = {
    "layers": (4, 3, 8, 3),
    "patch_sizes": (14, 1, 1, 1),
    "embed_dims": (384, 384, 384, 384),
    "hidden_sizes": (192, 192, 192, 192),
}
TINY = {"layers": (2, 4), "embed_dims": (96, 192), "hidden_sizes": (24, 48)}

VARIANTS = {
    # the paper's models (table 1), and the same at the resolution of its fine-tuning
    "sequencer2d_s": Variant("Sequencer2d", S),  # 27.7M
    "sequencer2d_m": Variant("Sequencer2d", M),  # 38.3M
    "sequencer2d_l": Variant("Sequencer2d", L),  # 54.3M
    "sequencer2d_s_392": Variant("Sequencer2d", S, img_size=392),
    "sequencer2d_m_392": Variant("Sequencer2d", M, img_size=392),
    "sequencer2d_l_392": Variant("Sequencer2d", L, img_size=392),
    "sequencer2d_l_d4_3x": Variant(  # 96.3M
        "Sequencer2d", L | {"embed_dims": (256, 512, 512, 512), "hidden_sizes": (64, 128, 128, 128)}
    ),
    # its ablations
    "sequencer2d_s_unidirectional": Variant("Sequencer2d", S | {"bidirectional": False}),
    "sequencer2d_s_add": Variant("Sequencer2d", S | {"union": "add"}),
    "sequencer2d_s_h2x": Variant("Sequencer2d", S_H2X),
    "sequencer2d_s_without_fc": Variant("Sequencer2d", S | {"with_fc": False}),
    "sequencer2d_vertical": Variant("Sequencer2d", S_H2X | {"union": "vertical", "with_fc": False}),
    "sequencer2d_s_horizontal": Variant("Sequencer2d", S_H2X | {"union": "horizontal", "with_fc": False}),
    "gru_sequencer2d_s": Variant("Sequencer2d", S | {"cell": "gru"}),
    "rnn_sequencer2d_s": Variant("Sequencer2d", S | {"cell": "rnn"}),
    "v_sequencer_s": Variant("VSequencer", V),
    "v_sequencer_s_h": Variant("VSequencer", S_H2X),
    "v_sequencer_s_pe": Variant("VSequencer", V | {"ape": True}),
    # other cells in the same backbone
    "indylstm_sequencer2d_s": Variant("Sequencer2d", S | {"cell": "indylstm"}),
    "peephole_sequencer2d_s": Variant("Sequencer2d", S | {"cell": "peephole_lstm"}),
    "lstm1997_sequencer2d_s": Variant("Sequencer2d", S | {"cell": "lstm1997"}),
    # for small images; the suffix is the size meant, the total stride is 2, 4 and 8
    "sequencer2d_t_8": Variant(
        "Sequencer2d",
        {"layers": (2, 2), "patch_sizes": (1, 2), "embed_dims": (64, 128), "hidden_sizes": (16, 32)},
        img_size=8,
        in_chans=1,
    ),
    "sequencer2d_p4_32": Variant(  # one stage on patches of 4 pixels, for a CPU
        "Sequencer2d",
        {"layers": (4,), "patch_sizes": (4,), "embed_dims": (128,), "hidden_sizes": (32,)},
        img_size=32,
    ),
    "sequencer2d_t_32": Variant("Sequencer2d", TINY | {"patch_sizes": (2, 2)}, img_size=32),
    "sequencer2d_t_64": Variant("Sequencer2d", TINY | {"patch_sizes": (4, 2)}, img_size=64),
}

PUBLISHED = {  # name -> weights that timm publishes, by tag
    "sequencer2d_s": "in1k",
    "sequencer2d_m": "in1k",
    "sequencer2d_l": "in1k",
}
