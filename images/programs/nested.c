/*
 * Runs a nested guest that never leaves user mode: four bytes of code, with page
 * tables of its own, by /dev/kvm. Prints "running" before it starts; ends only by
 * a signal.
 */
#include "result.h"

#include <fcntl.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#define MEMORY_BYTES (2 << 20)
#define TABLES 0x1000
#define CODE 0x8000
/* Present, writable, for users; and a large page. */
#define TABLE 7
#define LARGE_PAGE (TABLE | 1 << 7)

int main(void)
{
	int kvm = open("/dev/kvm", O_RDWR), vm, vcpu;
	unsigned char *memory;
	struct kvm_userspace_memory_region region = { .memory_size = MEMORY_BYTES };
	struct kvm_regs regs = { .rip = CODE, .rflags = 2, .rsp = CODE };
	struct kvm_sregs sregs;
	struct kvm_segment user = {
		.limit = 0xffffffff, .type = 3, .present = 1, .dpl = 3, .s = 1, .g = 1, .db = 1, .selector = 0x2b,
	};

	if (kvm < 0)
		cannot_tell("/dev/kvm");
	memory = mmap(NULL, MEMORY_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	vm = ioctl(kvm, KVM_CREATE_VM, 0);
	region.userspace_addr = (unsigned long)memory;
	if (memory == MAP_FAILED || vm < 0 || ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region))
		cannot_tell("a nested guest");
	vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	if (vcpu < 0 || ioctl(vcpu, KVM_GET_SREGS, &sregs))
		cannot_tell("its vCPU");
	*(unsigned long *)(memory + TABLES) = (TABLES + 0x1000) | TABLE;
	*(unsigned long *)(memory + TABLES + 0x1000) = (TABLES + 0x2000) | TABLE;
	*(unsigned long *)(memory + TABLES + 0x2000) = LARGE_PAGE;
	/* pause, and back to it */
	memcpy(memory + CODE, "\xf3\x90\xeb\xfc", 4);
	sregs.cr3 = TABLES;
	sregs.cr4 = 1 << 5;
	sregs.cr0 = 0x80000011;
	sregs.efer = 0x500;
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = user;
	sregs.cs = user;
	sregs.cs.type = 11;
	sregs.cs.selector = 0x33;
	sregs.cs.l = 1;
	sregs.cs.db = 0;
	if (ioctl(vcpu, KVM_SET_SREGS, &sregs) || ioctl(vcpu, KVM_SET_REGS, &regs))
		cannot_tell("its registers");
	puts("running");
	fflush(stdout);
	ioctl(vcpu, KVM_RUN, 0);
	cannot_tell("the nested guest");
}
