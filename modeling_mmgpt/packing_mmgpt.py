"""Packing: several documents in one row of tokens, each computed as if it stood alone.

Two things keep the documents of a row apart: the mask of the self-attention, which is causal inside a document and
closed between documents, and positions that start again with every document. Positions alone are not enough: some
families have none, and others derive the mask from them only where there is no padding.
"""

import torch
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate, packed_sequence_mask_function


# Bloom works its positions (ALiBi) out of a 2-D attention mask, which cannot say where a document begins.
CANNOT_PACK = ("bloom",)


def keep_documents_apart(
    text_model: PreTrainedModel, document_index: torch.LongTensor
) -> tuple[torch.Tensor | dict[str, torch.Tensor], torch.LongTensor]:
    """Make the arguments with which an LM keeps the documents of a row apart.

    Args:
        text_model: The LM.
        document_index: `(B, T)`, the document of each token, counted from 1; 0 at padding, behind all documents.

    Returns:
        `attention_mask` in the form that the LM's attention takes, usually `(B, 1, T, T)`, or a dict of such where
        its layers differ; and `position_ids` `(B, T)`.

    Raises:
        ValueError: If the LM's family cannot keep documents apart.
    """
    config = text_model.config
    if config.model_type in CANNOT_PACK or getattr(config, "alibi", False):
        raise ValueError(
            f"An LM of the family {config.model_type!r} cannot keep the documents of one row apart, since it takes "
            "its positions from a 2-D attention mask: give each document a row of its own."
        )
    mask = create_masks_for_generate(
        config=config,
        inputs_embeds=torch.empty(*document_index.shape, 0, dtype=text_model.dtype, device=document_index.device),
        attention_mask=(document_index > 0).long(),
        cache=None,
        and_mask_function=packed_sequence_mask_function(document_index),
    )
    return mask, positions_in_document(document_index)


def positions_in_document(document_index: torch.LongTensor) -> torch.LongTensor:
    """Count the tokens of each document from 0, `(B, T) -> (B, T)`."""
    position = torch.arange(document_index.shape[1], device=document_index.device).expand_as(document_index)
    is_first = torch.ones_like(document_index, dtype=torch.bool)
    is_first[:, 1:] = document_index[:, 1:] != document_index[:, :-1]
    return position - position.where(is_first, 0).cummax(dim=1).values


def images_of_document(
    is_image: torch.Tensor, document_index: torch.LongTensor
) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Count the images of the row before the document of each token, and up to its end; both `(B, T)`."""
    count = torch.zeros(len(is_image), is_image.shape[1] + 1, dtype=torch.long, device=is_image.device)
    count = count.scatter_add(1, document_index, is_image.long())  # (B, T + 1), no row has more documents than tokens
    upto = count.cumsum(dim=1)
    return (upto - count).gather(1, document_index), upto.gather(1, document_index)
