# Tells Coppice that the guest has booted: the byte 123 to port 0x3f0. Debian's cloud kernel has no /dev/port.
.globl _start
_start:
    # ioperm(0x3f0, 1, 1)
    mov $173, %eax
    mov $0x3f0, %edi
    mov $1, %esi
    mov $1, %edx
    syscall
    test %eax, %eax
    jnz over
    mov $0x3f0, %edx
    mov $123, %al
    out %al, %dx
over:
    # exit(0): what cannot be told is no harm
    mov $60, %eax
    xor %edi, %edi
    syscall
