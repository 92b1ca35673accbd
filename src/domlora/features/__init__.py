"""The ground: the contract that offline and online share."""
