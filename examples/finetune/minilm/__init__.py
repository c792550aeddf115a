"""What fairseq's --user-dir names: the plugin, and the architecture of the pretrained model."""

from fairseq.models import register_model, register_model_architecture
from fairseq.models.roberta import RobertaModel, base_architecture

import deltasam_plugin  # noqa: F401  (registers delta_sam)

EPSILON = 1e-12  # BERT's. fairseq has 1e-5, and no option for it


@register_model("minilm")
class MiniLM(RobertaModel):
    """RoBERTa whose layer norms have BERT's epsilon."""

    def __init__(self, args, encoder):
        super().__init__(args, encoder)
        for module in self.modules():
            if hasattr(module, "eps"):
                module.eps = EPSILON


@register_model_architecture("minilm", "minilm")
def minilm(args):
    """6 layers of width 384."""
    args.encoder_layers = getattr(args, "encoder_layers", 6)
    args.encoder_embed_dim = getattr(args, "encoder_embed_dim", 384)
    args.encoder_ffn_embed_dim = getattr(args, "encoder_ffn_embed_dim", 1536)
    args.encoder_attention_heads = getattr(args, "encoder_attention_heads", 12)
    base_architecture(args)
