"""What do 4-bit weights cost a detector? YOLOv10 trained twice from scratch, exported, scored and compared."""
