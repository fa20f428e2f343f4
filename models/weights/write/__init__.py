"""Writes models as other projects read them: transformers, PEFT, LLaVA, Bunny and Imp."""
