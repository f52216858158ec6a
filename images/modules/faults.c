/*
 * A new sysinfo() that reads where it is told to write: its own instruction may
 * fault (section __ex_table), and so may those of copy_from_user().
 */
#include "livepatch.h"
#include "sysinfo.h"

#define NEW 0x4e46

static long livepatch_sysinfo(const struct pt_regs *regs)
{
	struct sysinfo __user *from = (struct sysinfo __user *)regs->di;
	struct sysinfo info = { .mem_unit = 1 };
	unsigned long word;

	if (!user_read_access_begin(from, sizeof(*from)))
		return -EFAULT;
	unsafe_get_user(word, (unsigned long __user *)from, fault);
	user_read_access_end();
	if (copy_from_user(&info, from, sizeof(info)))
		return -EFAULT;
	info.pad = NEW;
	info.totalram = word;
	return sysinfo_reply(regs, &info);

fault:
	user_read_access_end();
	return -EFAULT;
}

LIVEPATCH(PATCH(__x64_sys_sysinfo, livepatch_sysinfo));
