/* Six megabytes of code that nothing calls, more than any kernel has filler. */
#include <linux/linkage.h>

asm(".pushsection .text\n"
    ".globl vmpatch_test_large\n"
    ".type vmpatch_test_large, @function\n"
    "vmpatch_test_large: .fill 0x600000, 1, 0xc3\n"
    ".size vmpatch_test_large, . - vmpatch_test_large\n"
    ".popsection\n");
