"""How good predicted frames are: SSIM and PSNR, LPIPS and FVD."""
