"""How tensors move between ranks: placements, boxes of indices, messages. No update rule is known here."""
