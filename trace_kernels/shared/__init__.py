"""What several loss ops share: rows, chunks, weighting, the split vocabulary. Imports runtime."""
