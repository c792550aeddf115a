"""The plugin for fairseq: ``--optimizer delta_sam`` and ``--criterion delta_sam``."""


def register() -> None:
    """Register δ-SAM with fairseq, and change fairseq where its tasks and checkpoints need it.

    Importing the submodules registers their components, as usual in fairseq. Everything else happens here.
    """
    from deltasam_plugin.fairseq import compat, criterion, optimizer
    from deltasam_plugin.fairseq.criterions import sentences, speech, tokens  # noqa: F401

    optimizer.OPTIONS.refresh()
    criterion.OPTIONS.refresh()
    compat.show_base_components((optimizer.OPTIONS, criterion.OPTIONS))
    compat.allow_checkpoints()
