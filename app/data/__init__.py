"""COCO folder or drawn dataset -> checked view that training reads; never writes to the dataset."""
