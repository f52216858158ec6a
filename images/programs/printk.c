/* Calls sysinfo(), which writes to the kernel's log if it is that of the module printk. */
#include "sysinfo.h"

int main(void)
{
	return see_sysinfo(0x4e50);
}
