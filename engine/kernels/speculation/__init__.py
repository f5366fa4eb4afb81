"""Draft tokens on the device: proposed from the rows, laid out as decodes, and accepted into the rows."""
