// SPDX-License-Identifier: GPL-2.0-only
/*
 * /dev/virtexit: the header and the slots, mapped read-only.
 */
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>

#include "compat.h"
#include "vx.h"

/* A mapping keeps its file open, and that the module. */
static int vx_open(struct inode *inode, struct file *file)
{
	vx_slots_pin();
	return 0;
}

static int vx_release(struct inode *inode, struct file *file)
{
	vx_slots_unpin();
	vx_kick();
	return 0;
}

static vm_fault_t vx_fault(struct vm_fault *vmf)
{
	struct page *page = vx_page(vmf->pgoff);

	if (!page)
		return VM_FAULT_SIGBUS;
	get_page(page);
	vmf->page = page;
	return 0;
}

static const struct vm_operations_struct vx_vm_ops = {
	.fault = vx_fault,
};

static int vx_mmap(struct file *file, struct vm_area_struct *vma)
{
	unsigned long pages = vx_map_size() >> PAGE_SHIFT;

	if (vma->vm_flags & (VM_WRITE | VM_EXEC))
		return -EPERM;
	if (!(vma->vm_flags & VM_MAYSHARE))
		return -EINVAL;
	if (vma->vm_pgoff > pages || vma_pages(vma) > pages - vma->vm_pgoff)
		return -EINVAL;
	vx_vm_flags_mod(vma, VM_DONTEXPAND | VM_DONTDUMP,
			VM_MAYWRITE | VM_MAYEXEC);
	vma->vm_ops = &vx_vm_ops;
	return 0;
}

static const struct file_operations vx_fops = {
	.owner = THIS_MODULE,
	.open = vx_open,
	.release = vx_release,
	.mmap = vx_mmap,
	.llseek = noop_llseek,
};

static struct miscdevice vx_misc = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = VIRTEXIT_DEVICE,
	.fops = &vx_fops,
	.mode = 0400,
};

int vx_device_init(void)
{
	return misc_register(&vx_misc);
}

void vx_device_exit(void)
{
	misc_deregister(&vx_misc);
}
