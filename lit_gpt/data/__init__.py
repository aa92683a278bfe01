"""From a file of records to tokens that a model trains on."""
