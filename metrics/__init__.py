"""Metrics of predicted frames: SSIM and PSNR, LPIPS and FVD."""
