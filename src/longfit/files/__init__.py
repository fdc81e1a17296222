"""Files at the border: what is read is checked and its failure named, what is written is whole or not there."""
